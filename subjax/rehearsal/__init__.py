"""A plan rehearsed on hardware that is not here: its steps compiled with abstract weights, and what they would cost."""
