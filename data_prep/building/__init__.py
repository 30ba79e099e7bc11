"""What all commands that write shards share: the folder beside the output, the record of each finished shard, and processes."""
