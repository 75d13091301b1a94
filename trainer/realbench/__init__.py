"""RealBench: how real do a generator's pictures look? `verism-eval realbench`, `compare` and `detectors`; docs/realbench.md."""
