"""Evolution strategies: unrolled computations, the engine, policies as particles, their search, updates and trials."""
