from tests.fault.memory_runs import Lab
def test_try(lab: Lab) -> None:
    und = lab.undisturbed()
    print(und.seconds, und.history[0], [e["step_s"] for e in und.history])
    told = lab.run(fault="kill:train.forward:rank=1:step=6:generation=1")
    print(told.seconds, told.said, [e["step_s"] for e in told.history])
    told.check(und)
