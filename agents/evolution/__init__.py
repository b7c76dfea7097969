"""Evolution strategies: unrolled computations, the engine, policies as particles, their search, updates, whitening, and trials."""
