"""Operations on packed tokens, one folder each: `reference.py` is the truth every faster version is held against."""
