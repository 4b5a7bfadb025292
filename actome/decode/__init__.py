"""Control of generation, and what can be known of it from sampling: outcome distributions, uncertainty."""

__all__: list[str] = []
