/** Colours of rewards: red below the middle, green-blue above; a scale is shared by all that is compared. */

import type { Scorer } from "./data";
import { isNumber, type Num } from "./text";

export interface Scale {
  middle: number;
  reach: number; // distance from the middle at which the colour is full
  scores: boolean; // step scores in [0, 1], not rewards
}

/** The scale of some scorers' steps. */
export function scaleOf(scorers: (Scorer | undefined)[]): Scale {
  let reach = 0;
  let scores = true;
  let long = false;
  for (const scorer of scorers) {
    if (!scorer) continue;
    for (const reward of scorer.reward) {
      if (!isNumber(reward)) continue;
      reach = Math.max(reach, Math.abs(reward));
      if (reward < 0 || reward > 1) scores = false;
    }
    for (const tokens of scorer.tokenRewards) {
      if (!scores) break;
      long ||= tokens.length > 1;
      for (let at = 0; at < tokens.length - 1; at++) if (tokens[at] !== 0) scores = false;
    }
  }
  return scores && long ? { middle: 0.5, reach: 0.5, scores: true } : { middle: 0, reach: reach || 1, scores: false };
}

/** From -1 to 1; null for what is not a number. Small rewards stay visible. */
export function strength(reward: Num | undefined, scale: Scale): number | null {
  if (!isNumber(reward)) return null;
  const part = (reward - scale.middle) / scale.reach;
  return Math.sign(part) * Math.min(1, Math.abs(part)) ** 0.6;
}

/** A CSS colour; `most` is the share of the full colour at strength 1, mixed into `ground`. */
export function tint(part: number | null, most: number, ground: string): string {
  if (part === null) return ground;
  const share = Math.round(Math.abs(part) * most);
  return `color-mix(in oklab, var(${part < 0 ? "--low" : "--high"}) ${share}%, ${ground})`;
}
