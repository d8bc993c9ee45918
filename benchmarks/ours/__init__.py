"""Our sides of the comparisons: what subjax does, one small function a comparison."""
