import pickle

from reward_fns import get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment


def test_they_are_those_of_trl():
    assert get_soft_overlong_punishment(100, 20)(completion_ids=[[1] * 90, [1] * 80, [1] * 101]) == [-0.5, 0.0, -1.0]
    assert get_repetition_penalty_reward(2)(completion_ids=[[1, 2, 3, 4], [5] * 5]) == [0.0, -0.75]
    cosine = pickle.loads(pickle.dumps(get_cosine_scaled_reward(max_len=100)))
    completions = [[{"content": r"\boxed{7}"}], [{"content": r"\boxed{8}"}]]
    assert cosine(completions=completions, solution=["$7$"] * 2, completion_ids=[[1] * 50] * 2) == [0.75, -0.75]
