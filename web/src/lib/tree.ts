// A conversation is a tree of messages; what is seen is one branch of it.

export interface Node {
  id: string
  parent: string | null
}

/** The messages from the first one to `leaf`, in that order. Empty for an unknown leaf. */
export function branch<T extends Node>(messages: readonly T[], leaf: string | null): T[] {
  const byId = new Map(messages.map((message) => [message.id, message]))
  const path: T[] = []
  for (let at = leaf === null ? undefined : byId.get(leaf); at; at = at.parent === null ? undefined : byId.get(at.parent)) {
    path.push(at)
    byId.delete(at.id) // so that a damaged tree with a ring ends too
  }
  return path.reverse()
}

/** The messages that stand where `message` does: other wordings of a question, other answers. Oldest first, itself included. */
export function siblings<T extends Node>(messages: readonly T[], message: T): T[] {
  return messages.filter((other) => other.parent === message.parent)
}

/** The end of the branch through `id` that was written last. */
export function newestLeaf(messages: readonly Node[], id: string): string {
  const children = new Map<string, string>()
  for (const message of messages) if (message.parent !== null) children.set(message.parent, message.id)
  let leaf = id
  for (let left = messages.length; left > 0 && children.has(leaf); left--) leaf = children.get(leaf)!
  return leaf
}
