from recadam_core.conformance.kit import BackendConformance


class TestDask(BackendConformance):
    backend = "dask"
