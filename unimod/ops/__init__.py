"""Operations on packed tokens: a reference in torch for each, and kernels that must give the same numbers."""
