"""How a step is found: score operators, solvers and value fits. Pure tensors, without environments."""
