"""A world of mixtures in eight dimensions, where scores and truth have closed forms: a microscope for methods."""
