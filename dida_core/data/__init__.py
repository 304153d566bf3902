"""Images, facts of a dataset, and the contract that travels with the weights."""
