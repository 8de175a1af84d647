from plain import multi_tensor_applier  # noqa: F401
