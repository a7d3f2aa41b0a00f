"""One file per loss: definition, op, fake, gradient, public function."""
