"""Operations that cost a pass over memory each when torch computes them one by one: one function an operation, fused on GPUs."""
