"""Properties are about results, not about how busy the machine is: no time limit per example."""

import hypothesis

hypothesis.settings.register_profile("codesign", deadline=None)
hypothesis.settings.load_profile("codesign")
