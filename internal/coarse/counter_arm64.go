package coarse

// counter reads the generic timer's virtual counter.
func counter() uint64
