"""Properties are about results, not about how busy the machine is: no time limit per example or for drawing them."""

import hypothesis

hypothesis.settings.register_profile("codesign", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("codesign")
