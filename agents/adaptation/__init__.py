"""Learning to adapt: the inner loop and the data of many tasks."""
