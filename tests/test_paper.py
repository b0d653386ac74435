"JoCorCallback.paper: the published rule, with the details of the official code."
import copy, numpy as np, pytest
from fastai_jocor.all import JoCorCallback, PairFlip, Symmetric
from learners import Record, Step, digits, digits64, mlps64
import reference

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

def official_rates(tau, n_epoch, num_gradual=10, exponent=1):
    "R of the epochs that the official code trains: it counts them from 1"
    rates = np.ones(n_epoch)*tau
    rates[:num_gradual] = np.linspace(0, tau**exponent, num_gradual)
    return rates[1:]

CASES = (.45,{}), (.5,dict(num_gradual=4)), (.2,dict(num_gradual=1)), (.2,dict(exponent=.5))

@pytest.mark.parametrize('tau,kw', CASES)
def test_the_official_schedule(tau, kw):
    cb = JoCorCallback.paper(forget_rate=tau, **kw)
    digits(bs=512).fit(12, 1e-3, cbs=cb)
    assert cb.history.R.tolist() == official_rates(tau, 13, **kw).tolist()
    assert cb.history.R[0] > 0 and 'noise_low' not in cb.history

def test_two_fits_are_one_schedule():
    learn,cb = digits(bs=512),JoCorCallback.paper(forget_rate=.4, num_gradual=5)
    for n in (2,4): learn.fit(n, 1e-3, cbs=cb)
    assert cb.history.R.tolist() == official_rates(.4, 7, 5).tolist()

TAUS = .1,.2,.3,.35,.4,.45,.49,.55,.6,.65,.7,.8,.9

def kept_of_each_batch(learn, cb):
    kept = []
    learn.fit(1, 0., cbs=[cb, Step(lambda l: kept.append(len(l.selection.kept)))])
    assert cb.rounding == 'official' and len(kept) == len(learn.dls.train) > 5
    return kept

@pytest.mark.parametrize('tau', (.45,.35,.3))
def test_how_many_are_kept(tau):
    "In each batch `int((1-R)*n)`, with τ as it was given, and what is left of it does not count"
    learn = digits(Symmetric(tau), bs=100)
    for given in (tau,None):
        kept = kept_of_each_batch(learn, JoCorCallback.paper(forget_rate=given, num_gradual=1))
        assert set(kept) == {int((1-tau)*100)}, given
    assert int((1-.45)*100) == 55

@pytest.mark.parametrize('noise', (Symmetric, PairFlip))
def test_the_rate_of_the_noise_is_exact(noise):
    "`1-(1-rate)` of a matrix is a rounding away from the rate, and `int` would keep an item less"
    y = np.arange(1000)%10
    assert [noise(tau).noise_rate(y, 10) for tau in TAUS] == list(TAUS)

@pytest.mark.parametrize('k', (2,3))
def test_same_weights_as_the_official_loop(k):
    learn,rec,nets,kept = digits64(bs=100),Record(),mlps64(k),[]
    twins = copy.deepcopy(nets)
    cb = JoCorCallback.paper(k=k, models=nets, forget_rate=.45, num_gradual=4)
    learn.fit(5, 2e-3, cbs=[cb, rec, Step(lambda l: kept.append(l.selection.kept.tolist()))])
    losses = lambda zs, y: reference.joint_losses(zs, y, co_lambda=.9)
    want = reference.train(twins, rec.batches, official_rates(.45, 6, 4), 2e-3, losses)
    assert [o.tolist() for o in want] == kept and [len(o) for o in kept[::12]] == [85,70,55,55,55]
    reference.assert_same_weights(learn.model.peers, twins)
