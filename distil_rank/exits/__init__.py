"""Early exits: the backbone stopped at an earlier layer, with an affine map to what later layers give."""
