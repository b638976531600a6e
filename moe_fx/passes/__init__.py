"""Graph → graph: find MoE blocks in a Dynamo graph, match, verify and rewrite them."""
