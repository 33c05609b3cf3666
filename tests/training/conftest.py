from toy_run import make_run

__all__ = ["make_run"]
