"""Surgery on trained experts: a checkpoint goes in, another one of the same step comes out."""
