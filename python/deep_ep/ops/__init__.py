"""One file per op: public function, fake, setup_context, backward, registration."""
