"""Settings for all tests."""

from hypothesis import HealthCheck, settings

# No test fails because the machine has something else to do.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")
