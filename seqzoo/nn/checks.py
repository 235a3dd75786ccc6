"""What constructors check of their settings."""


def at_least(least: float, **settings: float) -> None:
    """Refuses a setting that is too small.

    Raises:
        ValueError: names the first one, its value and what is allowed.
    """
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def head_widths(d_model: int, n_heads: int, name: str, expand: float) -> int:
    """expand * d_model, the width of all heads together.

    Raises:
        ValueError: it is no whole multiple of n_heads.
    """
    width = int(expand * d_model)
    if width < n_heads or width % n_heads:
        raise ValueError(
            f"{name} is {expand}: {width} channels (of d_model {d_model}) do not make "
            f"{n_heads} heads (n_heads) of equal width"
        )
    return width
