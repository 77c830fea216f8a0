"""SERAC: a scope classifier and a counterfactual model beside the frozen one."""
