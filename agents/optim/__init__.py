"""Optimizers: AdaBound and AMSBound, ClipUp, and parameters as one vector."""
