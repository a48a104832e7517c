// Days as people say them.

const DAY = 86_400_000

const midnight = (date: Date): number => new Date(date.getFullYear(), date.getMonth(), date.getDate()).getTime()

/** "Today", "Yesterday", "This week" or the month of a UTC time in ISO 8601. */
export function dayName(iso: string, now = new Date()): string {
  const date = new Date(iso)
  const days = Math.round((midnight(now) - midnight(date)) / DAY)
  if (days <= 0) return 'Today'
  if (days === 1) return 'Yesterday'
  if (days < 7) return 'This week'
  return date.toLocaleDateString('en', { month: 'long', year: 'numeric' })
}

/** Items with their day's name, in their order. */
export function byDay<T extends { updated: string }>(items: readonly T[], now = new Date()): [string, T[]][] {
  const groups = new Map<string, T[]>()
  for (const item of items) {
    const day = dayName(item.updated, now)
    groups.set(day, [...(groups.get(day) ?? []), item])
  }
  return [...groups]
}
