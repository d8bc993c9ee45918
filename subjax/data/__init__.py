"""The data: what models learn from and are asked."""
