"""The sampler: prompts in, completions out."""
