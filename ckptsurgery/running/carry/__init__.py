"""Trees beside the model that follow a plan: optimizers and averages, remade for the tensors that the plan makes."""
