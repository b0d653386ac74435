"A step on a GPU mixes no devices and reads no values, as far as a machine without one can tell."
import re, fastai_jocor, pytest, torch
from pathlib import Path
from fastai.vision.all import LabelSmoothingCrossEntropy, nn
from fastai_jocor.all import CoTeachingCallback, CoTeachingPlusCallback, JoCorCallback
from fake_gpu import watch
from learners import digits, same, weights

CORE = Path(fastai_jocor.__file__).parent
METHODS = [(JoCorCallback, dict(k=1)), (JoCorCallback, dict(k=3, forget_rate=.5)),
    (JoCorCallback, dict(k=3, rule='schedule', forget_rate=.5)), (JoCorCallback, dict(k=2, balance=.5)),
    (JoCorCallback, dict(k=2, rule='schedule', rounding='official', contrast='ce_circular')),
    (CoTeachingCallback, dict(k=2)), (CoTeachingPlusCallback, dict(k=3))]
LOSSES = dict(smooth=LabelSmoothingCrossEntropy, ignoring=lambda: nn.CrossEntropyLoss(ignore_index=3),
    weighted=lambda: nn.CrossEntropyLoss(torch.linspace(.5, 2, 10)))
CASES = [(*o, nn.CrossEntropyLoss) for o in METHODS] + [(*o, loss) for o in METHODS[1::2] for loss in LOSSES.values()]

@pytest.mark.parametrize('apples', (False,True))
@pytest.mark.parametrize('method,kw,loss', CASES)
def test_a_step_on_a_gpu(method, kw, loss, apples, monkeypatch):
    learn,alone = (digits(loss_func=loss()) for _ in range(2))
    alone.fit(2, 1e-3, cbs=method(seed=1, **kw))
    seen = watch(monkeypatch, apples=apples)
    learn.fit(2, 1e-3, cbs=method(seed=1, **kw))
    assert len(seen) == 2 and all(o.device.type == 'cuda' and len(o) for cols in seen for o in cols.values())
    assert same(weights(learn.model), weights(alone.model)) # the fake step has left nothing behind

def broken(change):
    class Broken(JoCorCallback):
        def batch_loss(self, logits, targ, R):
            change(logits)
            return super().batch_loss(logits, targ, R)
    return Broken(k=2, forget_rate=.5)

WRONG = [(lambda z: z+torch.zeros(10), 'same device'), (lambda z: z.sum().item(), 'local_scalar'),
    (lambda z: z[z>0], 'nonzero')]

def test_float64_on_a_gpu_of_apples(monkeypatch):
    watch(monkeypatch, apples=True)
    with pytest.raises(AssertionError, match='_to_copy'):
        digits().fit(1, 1e-3, cbs=broken(lambda z: z.double()))

def test_float64_is_made_on_the_cpu_or_asked_of_the_device():
    "Figures of an epoch are cast after they were copied to the CPU"
    for file in sorted(CORE.glob('*.py')):
        found = re.findall(r'(.{0,12})\.double\(\)', file.read_text(encoding='utf-8'))
        assert all(o.endswith(('.cpu()', 'else t')) for o in found), (file, found)

@pytest.mark.parametrize('change,error', WRONG)
def test_what_goes_wrong_is_seen(change, error, monkeypatch):
    watch(monkeypatch)
    with pytest.raises(Exception, match=error): digits().fit(1, 1e-3, cbs=broken(change))
