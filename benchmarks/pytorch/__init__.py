"""The other sides: transformers, peft and torch, as a researcher uses them today."""
