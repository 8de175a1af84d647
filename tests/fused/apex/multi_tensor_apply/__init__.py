def multi_tensor_applier(op, buffer, lists, *args):
    return op(2048 * 32, buffer, lists, *args)
