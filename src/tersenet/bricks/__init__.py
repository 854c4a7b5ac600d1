"""The modules that methods put into a model. Each is a plain nn.Module, or a parametrization of one."""
