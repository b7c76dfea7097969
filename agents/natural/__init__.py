"""The natural gradient: scores, solvers, curvature, the step, and the critic's fits on the same scores."""
