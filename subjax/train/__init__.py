"""The trainer: one step, in the roles of base, teacher and student."""
