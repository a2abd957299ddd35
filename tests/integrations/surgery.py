"""What both models' tests do to a model's modules."""


def classes(model):
    """Every module's class, by name."""
    return {name: type(module) for name, module in model.named_modules()}


def replaced(model, name, module):
    """``model`` with the module called ``name`` replaced."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model
