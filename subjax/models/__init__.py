"""The models: what is learned."""
