"""Operations: schemas with plain-PyTorch references, the kernels that claim them, and the plan that binds."""
