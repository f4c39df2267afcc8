import re


def rewards_of(turns: list[str], goals: dict[str, str], faults: dict[str, str], patience: int) -> list[float]:
    found, rewards = set(), []
    for text in turns[:patience]:
        new = {name for name, p in (goals | faults).items() if re.search(p, text, re.IGNORECASE | re.DOTALL)} - found
        found |= new
        rewards.append((len(new & goals.keys()) - len(new & faults.keys())) / len(goals))
        if goals.keys() <= found:
            break
    return rewards
