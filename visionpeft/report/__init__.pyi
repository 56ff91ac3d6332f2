from .writing import write as write
