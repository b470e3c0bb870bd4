"""What is computed: one file per op, each with its derivation, its public function and its autograd.Function."""
