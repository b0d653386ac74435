"How many labels are wrong: the surest predictions against a loop written out, and what must hold of any interval."
import numpy as np, pytest
from hypothesis import given, strategies as st
from fastai_jocor.interval import drop_limit, error_floor, guess_to_drop, sure_error, wrong_not_hard, wrong_share

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.sampled_from((.25,.5,1.)),
       st.integers(0, 99))
def test_the_surest_predictions_of_each_class(pairs, share, seed):
    predicted,labels = np.array(pairs).T
    conf = np.random.default_rng(seed).permutation(len(pairs))/len(pairs)
    wrong = 0
    for c in range(4):
        items = sorted((-conf[i], labels[i] != c) for i in range(len(pairs)) if predicted[i] == c)
        best = [o for _,o in items[:max(int(share*len(items)), 1)]]
        if items: wrong += sum(best)/len(best)*len(items)
    assert sure_error(predicted, conf, labels, share) == pytest.approx(wrong/len(pairs))

part = st.floats(0, 1)

@given(out=part, sure=part, n=st.integers(1, 10**5), alike=part)
def test_an_interval(out, sure, n, alike):
    rate,low,high = wrong_share(out, sure, n, alike)
    assert 0 <= low <= rate <= high <= 1
    assert low <= wrong_share(out, sure, n, 1.)[1] and wrong_share(out, sure, n, .5)[1] == 0

@given(out=part, sure=part, n=st.integers(10, 1000))
def test_more_labels_tell_more(out, sure, n):
    few,many = wrong_share(out, sure, n),wrong_share(out, sure, 100*n)
    assert many[2]-many[1] <= few[2]-few[1]+1e-9

def simulated(rate, skill, seed, n=3000, c=10):
    "What a network says of labels that were hidden from it: the surer it is, the more often it is right"
    rng = np.random.default_rng(seed)
    true = rng.integers(0, c, n)
    labels = np.where(rng.random(n) < rate, (true+rng.integers(1, c, n)) % c, true)
    conf = rng.beta(skill, 1, n)
    predicted = np.where(rng.random(n) < conf, true, (true+rng.integers(1, c, n)) % c)
    return predicted,conf,labels

def flat_of(predicted, conf, labels):
    sure = sure_error(predicted, conf, labels)
    return error_floor(predicted, conf, labels, sure)/sure

@pytest.mark.parametrize('n', (400,1000,5000))
def test_wrong_labels_are_told_from_hard_items(n):
    wrong = [wrong_not_hard(flat_of(*simulated(.4, 20, seed, n))) for seed in range(20)]
    hard = [wrong_not_hard(flat_of(*simulated(0., 2, seed, n))) for seed in range(20)]
    assert np.mean(wrong) > .95 and np.mean(hard) < {400: .3, 1000: .1, 5000: .01}[n]

@given(n=st.integers(225, 3000), a=st.floats(.05, .4), slope=st.floats(0, .6))
def test_the_floor_is_where_a_line_of_errors_begins(n, a, slope):
    rank = (np.arange(n)+.5)/n
    errors = np.cumsum(a+slope*rank) # one more error whenever the sum passes an integer
    labels = (np.diff(np.floor(errors), prepend=0) > 0).astype(int)
    zeros = np.zeros(n, int)
    share = min(.5, max(.1, 90/n))
    sure = sure_error(zeros, 1-rank, labels)
    m = share*n
    surest = sure_error(zeros, 1-rank, labels, share)
    error = .5/(.5-share)*(max(surest*(1-surest), 1/m)/m)**.5
    found = error_floor(zeros, 1-rank, labels, sure)-error
    assert found == pytest.approx(a, abs=(.5/(.5-share))*3/m)

@given(out=part, sure=part, n=st.integers(1, 10**5), flat=st.floats(-1, 2))
def test_hard_items_lower_the_lower_end_only(out, sure, n, flat):
    (rate,low,high),(as_wrong,other,same) = wrong_share(out, sure, n, flat=flat),wrong_share(out, sure, n)
    assert low <= other and high == same and rate <= as_wrong
    assert low == 0 or flat > .5

@pytest.mark.parametrize('rate', (0.,.1,.2,.4,.6))
@pytest.mark.parametrize('skill', (2,4,20)) # right in 67%, 80% and 95%
def test_the_truth_is_inside(rate, skill):
    for seed in range(5):
        predicted,conf,labels = simulated(rate, skill, seed)
        out = (predicted == labels).mean()
        guess,low,high = wrong_share(out, sure_error(predicted, conf, labels), len(labels), .9)
        slack = .04 if skill == 2 else .01
        assert low-slack <= rate <= high+slack and abs(guess-rate) < {2: .14, 4: .08, 20: .04}[skill]
        assert high-low < .45

@given(out=part, sure=part, n=st.integers(1, 10**5), alike=part)
def test_a_brake_stays_inside_the_interval(out, sure, n, alike):
    rate,low,high = wrong_share(out, sure, n, alike)
    limit = drop_limit(out, sure, n, rate, high)
    assert 0 <= limit <= high+1e-9
    assert limit == high or n < 1000 and sure < 1-out
    few,fewer = (drop_limit(out, sure, o, rate, high) for o in (900,100))
    assert fewer <= few+1e-9

def test_few_hard_items_are_dropped_with_caution():
    "Surer predictions fit 80 of 100 labels: where others fit 70 and 100 are known, the limit is near the guess of 18"
    assert drop_limit(.7, .2, 100, .18, .4) < .19 and drop_limit(.8, .2, 100, .18, .4) == pytest.approx(.4)
    assert .3 < drop_limit(.7, .2, 900, .18, .4) < .4 and drop_limit(.7, .2, 1000, .18, .4) == .4

@given(rate=st.floats(0, 1), low=st.floats(0, 1), n=st.integers(1, 400))
def test_the_guess_of_few(rate, low, n):
    rate,low = max(rate, low),min(rate, low)
    guess = guess_to_drop(rate, low, n)
    assert low-1e-9 <= guess <= rate and guess <= guess_to_drop(rate, low, n+1)+1e-9
    if n >= 250: assert guess == rate
    if n <= 150: assert guess == pytest.approx(low)
    assert guess_to_drop(rate, low, 200) == pytest.approx((rate+low)/2)
