"""The benchmark suite: workloads, peers, measurements and the report made from them."""
