"""Many runs from one file: which they are, each as a process, and how they rank."""
