"""What tests share: inputs, comparisons, and the programs that tests start."""
