"""Evidence about a version: golden tests, results of other tools, and the statistics of comparisons. None of it needs torch.

test_cases      golden tests in a file; `yaml_document`, that file in YAML
golden_tests    a run of them: answers come from `endpoint` or an engine, and `answer_checks` judges them
paired_tests    the same tests by two versions; `paired_losses`, the same documents; `sequential_test`, pairs that go on
                arriving
sampled_bounds  whether a bound holds of a sample; `sample_estimates`, how many would tell
rollout_rules   when a rollout goes on, or back
result_files    results of other tools
junit_report    JUnit's XML
version_names   how evidence names its version
"""
