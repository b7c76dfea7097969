"""Working on the shards of a run elsewhere: the executors, which know nothing of what they execute."""
